"""The commands: options, input of prompts and output of answers."""
