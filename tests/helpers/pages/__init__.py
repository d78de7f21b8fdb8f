"""The user who follows the pages, and the programs that this user runs."""
