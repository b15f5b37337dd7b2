"""A notebook: a Markdown file whose `headwise` fences are run, each under its hypothesis and over its result.

commands.py   the command lines of a fence: headwise verbs, never a shell
document.py   fences, hypotheses, `Compare:` lines and marked blocks of a text, with their line numbers
edit.py       a fence's state and the marked blocks, rewritten on the latest text of the file
memory.py     <notebook>.headwise.json: what a notebook must remember of its runs
identity.py   what a run is: its commands, code and data; where a run of another identity is put aside
planning.py   blocks: names, runs, studies, other verbs
running.py    the driver      verbs.py  the other verbs, each in its own process
watching.py   once, or whenever the file changes
results.py    groups of runs as tables and pictures      decide.py  what a `Compare:` line comes to
status.py     the table of `notebook status`             page.py    the page of `notebook report`
"""
