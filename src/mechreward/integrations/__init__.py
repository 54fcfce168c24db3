"""Doors for other people's trainers: TRL at the path the seed documents, and a reward server with clients for verl and
OpenRLHF. Thin adapters over `reward` and `training`; each imports the other package it is for, and none but that.

May be imported by report, pipeline and cli only; imports everything above.
"""
