"""Pages are never lost, never owned twice, and found again only by what they hold."""

import random

from reasoner.paged_books import Pages


def test_page_in_use_is_never_taken_again():
    pages = Pages(4, 2)
    taken = [pages.take() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3] and pages.available == 0
    pages.share(taken[0])
    pages.give_back(taken[:1])
    assert pages.available == 0
    pages.give_back(taken[:1])
    assert pages.available == 1 and pages.take() == taken[0]


def test_pages_are_found_by_all_the_tokens_before_their_end():
    pages = Pages(8, 2)
    held = [pages.take() for _ in range(3)]
    pages.remember([5, 6, 7, 8, 9], held)
    assert pages.find([5, 6, 7, 8, 9, 1]) == held[:2]  # the third page is not full
    assert pages.find([5, 6, 7, 1]) == held[:1]
    assert pages.find([7, 8]) == pages.find([6, 5]) == pages.find([5]) == []


def test_page_used_for_something_else_is_no_longer_found():
    pages = Pages(2, 2)
    held = [pages.take(), pages.take()]
    pages.remember([1, 2, 3, 4], held)
    pages.give_back(held)
    assert pages.find([1, 2, 3, 4]) == held
    assert pages.take() == held[1]  # the end of a sequence goes first
    assert pages.find([1, 2, 3, 4]) == held[:1]


def test_changed_weights_make_pages_unknown_even_while_they_are_in_use():
    pages = Pages(3, 1)
    used, idle = pages.take(), pages.take()
    pages.remember([1, 2], [used, idle])
    pages.give_back([idle])
    pages.forget()
    assert pages.find([1, 2]) == []
    pages.give_back([used])
    assert pages.available == 3


def test_no_page_is_lost_or_owned_twice_whatever_the_order():
    draw = random.Random(0)
    pages, held, owners = Pages(12, 3), [], [0] * 12
    for _ in range(3000):
        move = draw.choice(["begin", "grow", "end", "forget"] if draw.random() < 0.2 else ["begin", "grow", "end"])
        if move == "begin":
            ids = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
            mine = pages.find(ids)
            for page in mine:
                pages.share(page)
            held.append((ids, mine))
        elif move == "grow" and held and pages.available:
            held[draw.randrange(len(held))][1].append(pages.take())
        elif move == "end" and held:
            ids, mine = held.pop(draw.randrange(len(held)))
            pages.remember(ids, mine)
            pages.give_back(mine)
        elif move == "forget":
            pages.forget()
        owners = [sum(page in mine for _, mine in held) for page in range(12)]
        assert owners == pages._users
        assert pages.available == owners.count(0)
