"""Imports the selective attention log: its fences become the blocks of a notebook.

fences.py     prose and fences of the log, with their line numbers
shell.py      the commands of a fence: words, environment, wrappers, broken continuations; finds the runs
flags.py      the values of a run's flags and environment variables, and those that have no meaning here
defaults.py   the original program's defaults for omitted flags, for each state of that program
translate.py  a run as keys of this project's configuration
sources.py    the weights that a run starts from: files, earlier runs of the log, fresh models
presets.py    the same run at a size that trains in a second
notebook.py   the whole log, translated: blocks with their names, checked
write.py      the notebook's text and its shared configuration
counts.py     the counts of an import
command.py    `headwise notebook import`
"""
