"""Telling people: alerts to Slack that never hold up, and never repeat themselves."""
