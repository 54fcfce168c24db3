"""Studies: arms that differ in nothing but the reward, trained on the same seeds, for Gates 2 and 3 to judge.

`config.StudyConfig` says what is run; `study.run_study` runs it in parallel, resumable, and leaves `results.json`.
May be imported by cli; imports pipeline and what is above it. Nothing is imported here: a child process of `jobs`
starts with what its run needs and no more.
"""
