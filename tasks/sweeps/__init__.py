"""Many runs from one command: a grid, where it runs, what is left after any interruption, and what comes of it."""
