"""``shmelim demo``: the whole job in one command, measured on real hotkeys."""

import click

demo = click.Command("demo")
