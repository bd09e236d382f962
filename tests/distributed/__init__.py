"""Learning and pruning on several processes."""
