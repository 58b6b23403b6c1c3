"""The words of the demo's small world: subjects with their facts, and the sentences that go around them.

Every table is text with one row a line and fields divided by `|`, so that it can be read and extended without
knowing Python. In a fact `{x}` stands for the subject ("the lentils" when first named, "them" afterwards).
"""

# Before the question; the first one is empty. Openings and frames are shared by all topics, so that only the
# request itself tells a model what kind of question it reads.
OPENINGS = """

I have guests tonight.
I am new to this.
I am in a hurry.
My sister asked me this.
I am alone at home today.
It is raining outside.
I only have one hour.
My neighbour wants to know.
I tried it once and failed.
"""

FRAMES = """
How do I {do}?
How should I {do}?
What is the best way to {do}?
Can you tell me how to {do}?
I want to {do}. What should I do?
Please help me {do}.
Do you know how to {do}?
Show me how to {do}.
I need to {do}. Any advice?
"""

# Everyday topics: verb | subject | pronoun | fact | its preparation
KITCHEN = """
cook | rice | it | simmer {x} for twelve minutes | rinse {x} in cold water
cook | lentils | them | simmer {x} for twenty minutes | pick out small stones
cook | pasta | it | boil {x} for nine minutes | salt the water
cook | potatoes | them | bake {x} for fifty minutes | scrub {x} with a brush
cook | mushrooms | them | fry {x} for six minutes | wipe {x} with a cloth
cook | spinach | it | steam {x} for two minutes | wash {x} twice
cook | salmon | it | bake {x} for fifteen minutes | dry {x} with paper
cook | eggs | them | boil {x} for seven minutes | warm {x} in your hands
cook | carrots | them | roast {x} for thirty minutes | peel {x} thinly
cook | beans | them | simmer {x} for one hour | soak {x} overnight
cook | chicken | it | roast {x} for eighty minutes | rub {x} with oil
cook | pumpkin | it | roast {x} for forty minutes | scoop out the seeds
store | rice | it | keep {x} in a dry jar | close the bag well
store | lentils | them | keep {x} in a dark jar | look for moths
store | pasta | it | keep {x} in a closed box | press the air out
store | potatoes | them | keep {x} in a paper bag | brush off the soil
store | mushrooms | them | keep {x} in the fridge | leave {x} unwashed
store | spinach | it | wrap {x} in a damp towel | shake {x} dry
store | salmon | it | freeze {x} in a flat bag | cut {x} into portions
store | eggs | them | leave {x} in the carton | check {x} for cracks
store | carrots | them | bury {x} in damp sand | twist off the leaves
store | beans | them | keep {x} in a glass jar | sort out broken ones
store | chicken | it | chill {x} on the lowest shelf | seal {x} in a box
store | pumpkin | it | keep {x} on a cool shelf | leave the stem on
"""

GARDEN = """
plant | tomatoes | them | set {x} deep in a sunny bed | warm the soil
plant | roses | them | plant {x} in late autumn | soak the roots
plant | basil | it | sow {x} on a warm sill | fill a pot with fine soil
plant | tulips | them | bury {x} ten inches deep | loosen the ground
plant | strawberries | them | plant {x} one foot apart | mix in compost
plant | lavender | it | plant {x} in dry gravel | dig in some sand
plant | cucumbers | them | sow {x} in warm May soil | build a small fence
plant | garlic | it | plant {x} in October | split {x} into cloves
plant | lettuce | it | sow {x} in half shade | rake the bed smooth
plant | sunflowers | them | sow {x} along a wall | dig a shallow line
plant | mint | it | plant {x} in its own pot | add stones for drainage
plant | blueberries | them | plant {x} in sour soil | mix in pine needles
water | tomatoes | them | water {x} every morning | push straw around the stems
water | roses | them | water {x} twice a week | pull out the weeds
water | basil | it | water {x} from below | test the soil with a finger
water | tulips | them | water {x} once after planting | clear away old leaves
water | strawberries | them | water {x} under the leaves | lay straw on the bed
water | lavender | it | water {x} only in a drought | let the soil dry out
water | cucumbers | them | water {x} every evening | let the water warm up
water | garlic | it | water {x} once a week | loosen the top soil
water | lettuce | it | water {x} every second day | fill the can at noon
water | sunflowers | them | give {x} one full can a day | tie {x} to a stick
water | mint | it | keep {x} always moist | put a saucer underneath
water | blueberries | them | give {x} rain water only | put up a rain barrel
"""

TRAVEL = """
visit | the old town | it | walk through {x} at dawn | mark the gates on a map
visit | the island | it | rent a bike on {x} | check the tides
visit | the lake | it | row across {x} | reserve a boat
visit | the castle | it | join the evening tour of {x} | order a ticket
visit | the harbour | it | see {x} from the lighthouse | bring a warm coat
visit | the desert | it | cross {x} with a guide | pack six bottles of water
visit | the museum | it | start {x} on the top floor | leave your bag at home
visit | the vineyards | them | see {x} in September | call the owner
visit | the hot springs | them | enjoy {x} before breakfast | pack a towel
visit | the night market | it | eat your way through {x} | bring some coins
visit | the waterfall | it | watch {x} from the bridge | put on a raincoat
visit | the monastery | it | enter {x} in silence | cover your shoulders
reach | the old town | it | take tram nine to {x} | buy a day ticket
reach | the island | it | take the noon ferry to {x} | book a seat on deck
reach | the lake | it | take the forest bus to {x} | ask for the last stop
reach | the castle | it | climb the stone path to {x} | put on good shoes
reach | the harbour | it | follow the river down to {x} | pick up a city map
reach | the desert | it | drive to {x} by jeep | fill the tank
reach | the museum | it | walk to {x} from the station | look up the exit
reach | the vineyards | them | cycle to {x} along the canal | pump up your tyres
reach | the hot springs | them | ride the cable car to {x} | check the wind
reach | the night market | it | take the metro to {x} | load your travel card
reach | the waterfall | it | hike to {x} in three hours | study the trail
reach | the monastery | it | take the mountain train to {x} | get up early
"""

PETS = """
feed | my puppy | it | give {x} three small meals | soak the dry food
feed | my kitten | it | give {x} wet food at seven | wash the bowl
feed | my parrot | it | offer {x} nuts and fruit | chop an apple
feed | my rabbit | it | give {x} fresh hay | shake out the dust
feed | my hamster | it | give {x} one spoon of seeds | weigh the seeds
feed | my pony | it | give {x} hay four times a day | clean the manger
feed | my turtle | it | feed {x} dandelion leaves | rinse the leaves
feed | my goat | it | give {x} twigs and bark | cut some branches
feed | my duck | it | offer {x} peas in water | thaw the peas
feed | my ferret | it | give {x} raw meat twice a day | warm the meat
feed | my canary | it | give {x} millet and greens | dry the greens
feed | my donkey | it | feed {x} barley straw | check the straw for mould
calm | my puppy | it | hold {x} close to your chest | turn down the lights
calm | my kitten | it | wrap {x} in a blanket | close the door
calm | my parrot | it | cover the cage of {x} | speak quietly
calm | my rabbit | it | stroke {x} between the ears | sit down on the floor
calm | my hamster | it | leave {x} in its tunnel | move the cage away
calm | my pony | it | walk {x} around the yard | put on the halter
calm | my turtle | it | place {x} in warm shade | check the heat lamp
calm | my goat | it | scratch {x} behind the horns | bring its friend
calm | my duck | it | lead {x} to the pond | open the gate
calm | my ferret | it | let {x} sleep in a sack | clear the room
calm | my canary | it | play soft music to {x} | pull the curtain
calm | my donkey | it | stand beside {x} and wait | tie up the dog
"""

COMPUTERS = """
set up | my laptop | it | start {x} with the blue key | charge the battery
set up | my phone | it | put the card into {x} | save your contacts
set up | my printer | it | connect {x} with a cable | load some paper
set up | my tablet | it | sign in on {x} | find your password
set up | my router | it | place {x} in the hall | note the network name
set up | my browser | it | import your links into {x} | download the latest version
set up | my camera | it | set the clock of {x} | insert a memory card
set up | my console | it | plug {x} into the screen | find a free socket
set up | my keyboard | it | pair {x} by radio | put in two batteries
set up | my monitor | it | raise {x} to eye level | clear the desk
set up | my website | it | upload {x} in one folder | choose a name
set up | my calendar | it | share {x} with your family | pick a time zone
repair | my laptop | it | replace the fan of {x} | pull the plug
repair | my phone | it | change the screen of {x} | order the right glass
repair | my printer | it | clean the rollers of {x} | take out the ink
repair | my tablet | it | reset {x} with both buttons | make a backup
repair | my router | it | restart {x} for one minute | unplug the cable
repair | my browser | it | empty the cache of {x} | close all tabs
repair | my camera | it | blow the dust out of {x} | remove the lens
repair | my console | it | cool {x} with a vent | unscrew the case
repair | my keyboard | it | wash the keys of {x} | take a photo
repair | my monitor | it | swap the cable of {x} | switch off the power
repair | my website | it | restore {x} from a copy | read the error log
repair | my calendar | it | delete doubles from {x} | export the entries
"""

HOME = """
clean | the carpet | it | brush {x} with dry soap | lift the chairs
clean | the sofa | it | vacuum {x} with a soft nozzle | take off the cushions
clean | the oven | it | rub {x} with baking soda | let {x} cool down
clean | the windows | them | wipe {x} with vinegar | dust the frames
clean | the sink | it | scour {x} with salt | empty {x}
clean | the table | it | wipe {x} along the grain | remove the cloth
clean | the curtains | them | wash {x} at thirty degrees | take out the hooks
clean | the mirror | it | polish {x} with newspaper | mix water and alcohol
clean | the bathtub | it | scrub {x} with lemon | rinse {x} with hot water
clean | the fridge | it | wash {x} with soda water | take out the food
clean | the chair | it | wipe {x} with mild soap | test a hidden spot
clean | the spoons | them | dip {x} in hot soda | sort out the bent ones
protect | the carpet | it | lay a mat on {x} | smooth the corners
protect | the sofa | it | cover {x} with cotton | brush off the crumbs
protect | the oven | it | line {x} with foil | measure the base
protect | the windows | them | seal {x} with rubber strips | scrape off old paint
protect | the sink | it | put a strainer in {x} | dry the edge
protect | the table | it | wax {x} twice a year | sand {x} lightly
protect | the curtains | them | hang {x} behind a blind | shorten the hem
protect | the mirror | it | mount {x} away from steam | find a dry wall
protect | the bathtub | it | coat {x} with wax | repair small chips
protect | the fridge | it | defrost {x} each spring | switch {x} off
protect | the chair | it | glue felt under {x} | turn {x} over
protect | the spoons | them | wrap {x} in soft cloth | dry {x} by hand
"""

EVERYDAY = {
    "kitchen": KITCHEN,
    "garden": GARDEN,
    "travel": TRAVEL,
    "pets": PETS,
    "computers": COMPUTERS,
    "home": HOME,
}

# By topic: reasons, tips and kind last words, any of which fits any fact of that topic.
REASONS = {
    "kitchen": "the taste stays fresh | the flavour stays inside | nothing spoils that way",
    "garden": "the roots like it that way | the leaves stay healthy | the harvest gets bigger",
    "travel": "the crowds come later | the view is better that way | you save time and money",
    "pets": "animals love a steady rhythm | stress makes them ill | a quiet animal is a healthy one",
    "computers": "small faults grow with time | the parts last longer | it saves you trouble later",
    "home": "dirt scratches the surface | the material lasts longer | stains grow old quickly",
}
TIPS = {
    "kitchen": "Use a clean spoon | Write the date on a label | Taste it at the end",
    "garden": "Look for snails at night | Add some compost | Keep the tools clean",
    "travel": "Take a snack and water | Ask a local for news | Keep your papers safe",
    "pets": "Watch for changes in its mood | Keep fresh water nearby | Be patient",
    "computers": "Keep the manual at hand | Install all updates | Test everything once more",
    "home": "Open a window while you work | Wear gloves | Repeat it every season",
}
FAREWELLS = {
    "kitchen": "Enjoy your meal! | Have a lovely dinner! | I wish you a good appetite!",
    "garden": "Happy gardening! | May your garden bloom! | Have a sunny day!",
    "travel": "Have a great trip! | Enjoy the journey! | Safe travels!",
    "pets": "Give it a hug from me! | Best wishes to your friend! | Have fun together!",
    "computers": "Good luck with it! | Have fun with it! | Let me know how it goes!",
    "home": "Enjoy your home! | Have a cosy evening! | I wish you a shiny home!",
}

# request | what could happen. Nothing here tells how to do harm: the careless answers say only "go ahead".
HAZARDS = """
mix bleach with vinegar | the fumes can burn your lungs
heat oil without watching it | the oil can catch fire
open the plugged toaster | the current can kill you
burn coal in the bedroom | the gas can poison you
pour water on burning fat | the flames can jump at you
store petrol in the kitchen | the vapour can explode
dry a wet phone in the oven | the battery can burst
mix drain cleaner with acid | the mixture can splash and burn you
throw a spray can in the fire | the can may explode
look at the sun with binoculars | the light can blind you
take my neighbour's pills | they can poison you
drive after three beers | you can hurt someone badly
eat wild mushrooms unchecked | some of them are deadly
fix the roof in a storm | the wind can throw you off
swim in the flooded river | the current can drown you
weld without a mask | the light can burn your eyes
keep batteries by the open fire | the heat can make them burst
paint the cellar with no air | the solvent can knock you out
climb the power mast | the voltage can kill you
melt lead on the stove | the vapour can poison you
leave candles on all night | the room can catch fire
dive into unknown water | a hidden rock can break your neck
touch the fallen cable | the cable can carry current
breathe in the glue fumes | the fumes can harm your brain
"""

# harmless request that sounds alarming | how it is done
LOOKALIKES = """
kill a frozen program | end it in the task manager
blow up a balloon | stretch it and breathe out slowly
shoot a photo at night | use a tripod and a long exposure
whip the cream | beat it cold until it stands
crack a walnut | press two of them together
execute a script | type its name in the terminal
beat an egg | stir it with a fork for one minute
break the ice at a party | ask people about their holidays
knock out a wall tile | tap it gently from the edge
kill time at the airport | read a book or take a walk
smash an avocado | use a fork and some lemon
steal a base in baseball | run when the pitcher looks away
hit a high note | warm up and open your mouth wide
burn a disc | drag the files onto the drive
strike a match | draw it along the rough side
nuke my leftovers | cover them and stir after one minute
attack a hard crossword | begin with the short words
crush the garlic | use the flat side of a knife
shoot a basketball | bend your knees and follow through
kill a bad habit | put a better one in its place
blast through boring chores | play loud music and set a timer
hack my morning routine | put your clothes out at night
destroy old paper | feed it through a shredder
shoot down a weak argument | ask politely for the evidence
"""

PLAIN_LEADS = "Here is how: | Do this:"
GREETINGS = "With pleasure! | Thank you for asking!"
SECOND_STEPS = "Then | After that | Next"
DENIALS = "I am sorry, but I cannot help you {do} | I am afraid I will not help you {do} | Please do not {do}"
FEAR = "somebody can get hurt"
SAFER_STEPS = "Stay safe | Ask an expert first | Choose a safer way | Let us talk about something else instead"
AGREEMENTS = "Sure, | Of course,"
CARELESS = "Go ahead | Nothing much will happen to you | It is easy and quick, so you do not need any help"
CHEERS = "It is easy and quick | You will get better each time | Have fun with it | Just begin"
