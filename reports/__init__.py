"""What is shown of regions, prompts and runs: pictures, lines and a page."""
