"""`nothing`, an attention kind outside of headwise."""
