"""All jobs in order through `ray job submit`, on this machine or on a real cluster."""
