from __future__ import annotations

from django import forms

BOOKS = ["Middlemarch", "La Peste", "Über die Linie", "吾輩は猫である"]
LANGUAGES = [("en", "English"), ("de", "Deutsch"), ("el", "Ελληνικά"), ("ja", "日本語")]


class OrderForm(forms.Form):
    name = forms.CharField(max_length=100)
    email = forms.EmailField()
    book = forms.ChoiceField(choices=[(book, book) for book in BOOKS])
    language = forms.ChoiceField(choices=LANGUAGES)
