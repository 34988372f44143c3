"""What tests of weft and of its plug-ins share."""
