"""Scheduled scoring of a collection: what changed, what is known of every image, and whether the scores drift."""
