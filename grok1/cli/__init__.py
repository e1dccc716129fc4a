"""The commands: their options, where prompts come from and where answers go."""
