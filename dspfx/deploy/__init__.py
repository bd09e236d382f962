"""Running networks outside training: in other runtimes, and against the clock."""
