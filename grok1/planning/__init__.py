"""Plan whether a model fits a machine: by formula, and by compiling its steps."""
