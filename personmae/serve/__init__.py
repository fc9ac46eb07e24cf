"""``personmae serve``: a web page that searches a gallery and shows what a model sees."""
