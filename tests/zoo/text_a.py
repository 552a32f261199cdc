"""The builds from afmoe to kolibri1."""

from zoo import text_a1, text_a2, text_a3, text_a4

BUILDS = [*text_a1.BUILDS, *text_a2.BUILDS, *text_a3.BUILDS, *text_a4.BUILDS]
