"""Everything around the jobs on a cluster: configurations, the submitter, and an autoscaling cluster on one machine."""
