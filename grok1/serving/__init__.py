"""Requests in, tokens out: what runs between a prompt and its answer."""
