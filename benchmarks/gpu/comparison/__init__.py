"""llmtune beside other tools: what is compared, the tools, and the table."""
