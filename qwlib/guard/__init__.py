"""Content safety: a model asked whether a message is safe, and how well it tells.

judging   `Judge(lm, guard)`: P(unsafe), or a verdict in words
guards    the table of guards: how each is asked
verdicts  what a guard wrote, read strictly
labelled  messages with labels
classify  how well scores tell unsafe from safe; whether other weights change that
"""
