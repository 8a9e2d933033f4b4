"""Publishes a checkpoint, an adapter or a voice: `python pipelines/push_to_hub.py FOLDER --repo-id OWNER/NAME`, as `indextts2 push`."""

import sys

from indextts2_cli import main


sys.exit(main(["push", *sys.argv[1:]]))
