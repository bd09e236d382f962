"""Running networks outside training: timing now, runtimes later."""
