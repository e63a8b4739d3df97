"""Raw documents -> documents worth training on, with a reason for every one that is left out.

rules       which rules there are, their order, one document's way through them
page        a text and what several rules want to know about it
mojibake    UTF-8 read as Latin-1 or GBK            normalise    NFC, widths, control characters, spaces
markup      HTML, front matter, frames of pages     quality      is it running text? per language
frame       banners, login walls, footers, logs
repetition  the same over and over                  personal     e-mail, IP, phone, identity and card numbers
word_lists  the user's term table and block list    report       what happened, for people and programs
stage       sources -> cleaned sources on disk
"""
