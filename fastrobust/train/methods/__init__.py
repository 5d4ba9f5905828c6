"""The training methods, one file each: a function that reads like its paper's algorithm, and its section of a config."""
