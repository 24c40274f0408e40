"""Telling people: messages to Slack, each repeated text once."""

from shmelim.notify.slack import SlackNotifier

__all__ = ["SlackNotifier"]
