"""Many runs from one command: a grid, where it runs, what is left to do after any interruption."""
