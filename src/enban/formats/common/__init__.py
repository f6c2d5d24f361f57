"""What formats share: L2 tables in memory, long runs found fast, what a check says."""
