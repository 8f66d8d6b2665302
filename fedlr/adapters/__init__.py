"""The only home of PEFT: adapters in a live model, and their wire and file forms."""
