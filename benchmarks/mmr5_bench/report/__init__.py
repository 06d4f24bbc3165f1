"""Reading evidence: two runs compared, and one HTML page, Markdown or CI file made from runs."""
