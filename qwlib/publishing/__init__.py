"""An artefact on the Hugging Face Hub, and back.

publish   `publish(folder, repository)`: checked, sent in one commit, downloaded again and compared
card      the card, from manifest and records
licences  what the base model's licence allows and asks for
remote    one repository: looked at, filled, read back
"""
