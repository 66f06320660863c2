"""For each operation a file with the inputs that tests compare on, the sizes that are timed, and the peers."""
