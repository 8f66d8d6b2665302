"""A frozen linear map with a low-rank update, differentiated for x and B only."""
