"""Other tools: their vector formats, adapters for servers, and the card beside an export."""
