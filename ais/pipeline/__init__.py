"""The batch job on Ray Data: fetch and decode, score and explain, render, write."""
