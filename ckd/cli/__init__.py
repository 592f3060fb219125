"""The commands: what they share."""
