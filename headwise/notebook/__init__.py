"""A notebook: a Markdown file whose `headwise` fences are run, each below its hypothesis and above its
result.

commands.py   the command lines of a fence: headwise verbs, never a shell
document.py   fences, hypotheses, `Compare:` lines and marked blocks of a text, with their line numbers
edit.py       rewrites the state of a fence and the marked blocks in the latest text of the file
memory.py     <notebook>.headwise.json: the record of runs and comparisons
identity.py   the identity of a run: its configuration, code and data; moves runs of another identity away
planning.py   blocks: names, runs, studies, other verbs
running.py    the driver      verbs.py  the other verbs, each in its own process
watching.py   runs a notebook once, or whenever the file changes
results.py    groups of runs as tables and figures       decide.py  the decisions on `Compare:` lines
status.py     the table of `notebook status`             page.py    the page of `notebook report`
"""
