"""These tests import ComfyUI into their process; it has to lie on sys.path before they are collected."""

from dev import host

host.import_comfy()
