"""The front end's text side: prompts into token ids, output tokens into text. No tensors here."""
