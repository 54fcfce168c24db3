"""Doors for other people's trainers, at the paths the seed documents: thin adapters over `reward` and `training`.

May be imported by report, pipeline and cli only; imports everything above.
"""
