"""Reading the selective attention log: its fences become the blocks of a notebook.

fences.py     prose and fences of the log, with their line numbers
shell.py      the commands of a fence: words, environment, wrappers, broken continuations; which are runs
flags.py      what a run's flags and environment ask for, and which of them have no meaning here
defaults.py   what that program did where a command is silent, by the state that the program was in
translate.py  a run as keys of this project's configuration
sources.py    the weights that a run starts from: files, earlier runs of the log, fresh models
presets.py    the same run at a size that trains in a second
notebook.py   the whole log, translated: blocks with their names, checked
write.py      the notebook's text and its shared configuration
counts.py     what was counted
command.py    `headwise notebook import`
"""
