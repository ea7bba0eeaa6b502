"""Hours of mixed load over a service whose processes and network fail at random."""
