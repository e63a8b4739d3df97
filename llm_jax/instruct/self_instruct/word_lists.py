"""Words that filters and the report look for, in both languages."""

# what a model of text cannot do, or only pretends to (after the paper's list), and its commonest rut
ENGLISH_KEYWORDS = (
    "image", "images", "picture", "pictures", "photo", "photos", "photograph", "graph", "graphs", "chart",
    "charts", "diagram", "diagrams", "flowchart", "file", "files", "map", "maps", "draw", "plot", "video",
    "videos", "audio", "screenshot", "attachment", "attached", "go to", "click", "write a program",
)  # fmt: skip
CHINESE_KEYWORDS = (
    "图片", "图像", "图表", "图形", "照片", "相片", "截图", "上图", "下图", "插图", "流程图", "思维导图", "画出", "绘制",
    "画一", "文件", "附件", "视频", "音频", "录音", "地图", "网址", "链接", "点击", "下载", "打开网页",
)  # fmt: skip

VERBS = (
    "add adapt analyse analyze answer arrange assess assign brainstorm break calculate categorise categorize change "
    "check choose cite classify combine come compare complete compose compute condense construct contrast convert "
    "correct count create criticise criticize debug decide define delete derive describe design detect determine "
    "develop devise differentiate discuss divide draft edit elaborate estimate evaluate examine expand explain "
    "express extract fill find fix format formulate generate give group guess help identify imagine implement "
    "improve infer insert interpret introduce invent judge label list make match mention modify name offer optimise "
    "optimize order organise organize outline paraphrase pick plan predict prepare produce proofread propose prove "
    "provide put rank rate read rearrange recommend reduce rephrase replace reply report respond restate reverse "
    "review revise rewrite round score select separate shorten show simplify solve sort spell split state structure "
    "suggest summarise summarize tell think transcribe transform translate turn unscramble use verify write"
)
QUESTIONS = "what how why who when where which is are can do does should could would if in on given with for"
EVIDENCE = (
    "the of and to is that it with this are be by you if which have your more any other from what how why who when "
    "where should would could each every their there these those into about between following given"
)
BEFORE_NOUNS = (
    "a an the this that these those some any each every all both two three four five six ten my your his her its our "
    "their me us one following given short brief simple new good clear long small possible different next same it "
    "you i we they he she them him"
)
AFTER_NOUNS = (
    "of in on at to for from with by about into that which who whose and or as using between if when while where "
    "how what why than is are was so but based without within through during after before under over"
)
ENGLISH_VERBS = frozenset(VERBS.split())  # English tasks begin with them
ENGLISH_QUESTIONS = frozenset(QUESTIONS.split())
# words that few other languages have; without one of them or a verb a Latin text is not taken for English
ENGLISH_EVIDENCE = frozenset(EVIDENCE.split())
DETERMINERS = frozenset(
    BEFORE_NOUNS.split()
)  # and pronouns: never the object that a table should show
# an English noun phrase ends before one of these, so the word before is its head
PHRASE_ENDS = frozenset(AFTER_NOUNS.split())

CHINESE_VERBS = (
    "总结", "概括", "归纳", "翻译", "译成", "改写", "改成", "改正", "修改", "润色", "续写", "仿写", "缩写", "扩写", "撰写",
    "编写", "写", "拟", "造句", "解释", "说明", "介绍", "描述", "说出", "讲", "列出", "列举", "列", "举出", "举", "指出", "给出",
    "提出", "提供", "推荐", "建议", "设计", "制定", "安排", "规划", "准备", "计算", "求", "解答", "证明", "推导", "比较", "对比",
    "分析", "评价", "评定", "判断", "识别", "区分", "辨别", "分类", "归类", "归入", "分组", "属于", "提取", "抽取", "找出", "挑出",
    "选出", "选择", "排列", "排序", "转换", "换算", "补全", "完成", "填", "加上", "生成", "创作", "编", "起个", "起名", "猜",
    "预测", "估计", "回答", "模拟", "扮演", "检查", "纠正", "简化", "整理", "统计", "观察",
)  # fmt: skip
# before the verb: asks, and says nothing of what
CHINESE_OPENINGS = ("请你", "请", "帮我", "帮忙", "试着", "试", "你能", "麻烦", "能否", "可以")
