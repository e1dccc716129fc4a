"""Serving: from requests to tokens."""
