"""What the user brought: folders, tables, captions and pictures, until they are a `PictureSet`."""
