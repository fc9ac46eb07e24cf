"""A gallery of people's images that can be searched: built from features, added to, and removed from.

Nothing here knows a name or a face. An image has an id, and perhaps a camera, a time and a thumbnail.
"""
