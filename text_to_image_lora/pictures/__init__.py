"""The user's pictures: from folders, tables and captions to a `PictureSet`."""
