"""Systems' predictions ranked by a large model or by people."""
