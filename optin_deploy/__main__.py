"""`python -m optin_deploy` is `optin`: what torchrun and other launchers start."""

from optin_deploy.cli import main

main()
