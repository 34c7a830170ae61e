"""How the shipped model was made, script by script, see README.md. Nothing outside this folder imports it."""
